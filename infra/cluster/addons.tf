# EKS's own add-ons, in two steps: what a node needs to become ready, and what needs a node to run on.

locals {
  network_policy = jsonencode({ enableNetworkPolicy = "true" })
  addons_before_nodes = {
    vpc-cni                = { role = aws_iam_role.pods["vpc-cni"].arn, account = "aws-node", values = local.network_policy }
    kube-proxy             = { role = null, account = null, values = null }
    eks-pod-identity-agent = { role = null, account = null, values = null }
  }
  addons_on_nodes = merge(
    {
      coredns            = { role = null, account = null, values = null }
      metrics-server     = { role = null, account = null, values = null }
      aws-ebs-csi-driver = { role = aws_iam_role.pods["ebs-csi"].arn, account = "ebs-csi-controller-sa", values = null }
    },
    # The file system is made here and mounted as it is: the driver needs no right in AWS.
    var.lustre == null ? {} : { aws-fsx-csi-driver = { role = null, account = null, values = null } },
  )
}

resource "aws_eks_addon" "before_nodes" {
  for_each                    = local.addons_before_nodes
  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  addon_version               = lookup(var.addon_versions, each.key, null)
  configuration_values        = each.value.values
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"

  dynamic "pod_identity_association" {
    for_each = each.value.role == null ? [] : [each.value]
    content {
      role_arn        = pod_identity_association.value.role
      service_account = pod_identity_association.value.account
    }
  }
}

resource "aws_eks_addon" "on_nodes" {
  for_each                    = local.addons_on_nodes
  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  addon_version               = lookup(var.addon_versions, each.key, null)
  configuration_values        = each.value.values
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"

  dynamic "pod_identity_association" {
    for_each = each.value.role == null ? [] : [each.value]
    content {
      role_arn        = pod_identity_association.value.role
      service_account = pod_identity_association.value.account
    }
  }

  depends_on = [aws_eks_node_group.system]
}
