# Who may do what in Kubernetes, by IAM role. There is no aws-auth map and no administrator by accident.

locals {
  access = merge(
    { for arn in var.administrators : arn => "AmazonEKSClusterAdminPolicy" },
    { for arn in var.viewers : arn => "AmazonEKSAdminViewPolicy" if !contains(var.administrators, arn) },
  )
}

resource "aws_eks_access_entry" "people" {
  for_each      = local.access
  cluster_name  = aws_eks_cluster.this.name
  principal_arn = each.key
}

resource "aws_eks_access_policy_association" "people" {
  for_each      = local.access
  cluster_name  = aws_eks_cluster.this.name
  principal_arn = aws_eks_access_entry.people[each.key].principal_arn
  policy_arn    = "arn:${local.partition}:eks::aws:cluster-access-policy/${each.value}"
  access_scope {
    type = "cluster"
  }
}

# What they may do is the role `launcher` of infra/platform/queues.
resource "aws_eks_access_entry" "engineers" {
  for_each          = var.engineers
  cluster_name      = aws_eks_cluster.this.name
  principal_arn     = each.key
  kubernetes_groups = ["fmops:engineers"]
}

# Managed node groups make this entry by themselves; Karpenter's nodes need it.
resource "aws_eks_access_entry" "nodes" {
  cluster_name  = aws_eks_cluster.this.name
  principal_arn = aws_iam_role.nodes.arn
  type          = "EC2_LINUX"
}
