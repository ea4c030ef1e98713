# One IAM role for each service account that needs one, through EKS Pod Identity. No key is stored anywhere, and the
# node's own role can do nothing but join the cluster and pull images.

locals {
  read_artifacts = [{
    Effect   = "Allow"
    Action   = ["s3:GetObject", "s3:GetObjectVersion"]
    Resource = "${aws_s3_bucket.artifacts.arn}/*"
    }, {
    Effect   = "Allow"
    Action   = ["s3:ListBucket", "s3:GetBucketLocation"]
    Resource = aws_s3_bucket.artifacts.arn
    }, {
    Effect   = "Allow"
    Action   = ["kms:Decrypt"]
    Resource = aws_kms_key.data.arn
  }]
  write_artifacts = concat(local.read_artifacts, [{
    Effect   = "Allow"
    Action   = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    Resource = "${aws_s3_bucket.artifacts.arn}/*"
    }, {
    Effect   = "Allow"
    Action   = ["kms:GenerateDataKey"]
    Resource = aws_kms_key.data.arn
  }])

  # namespace and account: who may take the role (null: the add-on makes the association). managed: AWS's own policy.
  identities = {
    vpc-cni = { namespace = null, account = null, managed = "AmazonEKS_CNI_Policy", statements = [] }
    ebs-csi = { namespace = null, account = null, managed = "service-role/AmazonEBSCSIDriverPolicy", statements = [] }

    karpenter = { namespace = "kube-system", account = "karpenter", managed = null, statements = local.karpenter_statements }
    # A stage reads and writes artifacts, and deletes none: what is committed stays.
    stages    = { namespace = "fmops-train", account = "stages", managed = null, statements = local.write_artifacts }
    predictor = { namespace = "fmops-serve", account = "predictor", managed = null, statements = local.read_artifacts }
    dagster   = { namespace = "dagster", account = "dagster", managed = null, statements = local.write_artifacts }
    mlflow    = { namespace = "mlflow", account = "mlflow", managed = null, statements = local.write_artifacts }

    external-secrets = { namespace = "external-secrets", account = "external-secrets", managed = null, statements = [{
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
      Resource = [for database in aws_db_instance.metadata : database.master_user_secret[0].secret_arn]
      }, {
      # Anything else that the cluster may read is put under this name by a person.
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
      Resource = "arn:${local.partition}:secretsmanager:${var.region}:${var.account_id}:secret:${var.name}/*"
      }, {
      Effect   = "Allow"
      Action   = ["kms:Decrypt"]
      Resource = aws_kms_key.data.arn
    }] }

    fluent-bit = { namespace = "logging", account = "fluent-bit", managed = null, statements = [{
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
      Resource = "${aws_cloudwatch_log_group.pods.arn}:*"
    }] }
  }
}

resource "aws_iam_role" "pods" {
  for_each = local.identities
  name     = "${var.name}-${each.key}"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Condition = {
        StringEquals = { "aws:SourceAccount" = var.account_id }
        ArnEquals    = { "aws:SourceArn" = "arn:${local.partition}:eks:${var.region}:${var.account_id}:cluster/${var.name}" }
      }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "pods" {
  for_each   = { for name, identity in local.identities : name => identity.managed if identity.managed != null }
  role       = aws_iam_role.pods[each.key].name
  policy_arn = "arn:${local.partition}:iam::aws:policy/${each.value}"
}

resource "aws_iam_role_policy" "pods" {
  for_each = { for name, identity in local.identities : name => identity.statements if identity.managed == null }
  name     = "rights"
  role     = aws_iam_role.pods[each.key].id
  policy   = jsonencode({ Version = "2012-10-17", Statement = each.value })
}

resource "aws_eks_pod_identity_association" "pods" {
  for_each        = { for name, identity in local.identities : name => identity if identity.namespace != null }
  cluster_name    = aws_eks_cluster.this.name
  namespace       = each.value.namespace
  service_account = each.value.account
  role_arn        = aws_iam_role.pods[each.key].arn
}
