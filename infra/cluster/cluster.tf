resource "aws_iam_role" "control_plane" {
  name = "${var.name}-control-plane"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "eks.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "control_plane" {
  role       = aws_iam_role.control_plane.name
  policy_arn = "arn:${local.partition}:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_eks_cluster" "this" {
  # checkov:skip=CKV_AWS_39: private unless public_access_cidrs names ranges of /24 or narrower
  # checkov:skip=CKV_AWS_38: the whole internet cannot be named: the variable's validation refuses it
  # checkov:skip=CKV_AWS_339: this list of versions is older than the Kubernetes version in use
  name     = var.name
  version  = var.kubernetes_version
  role_arn = aws_iam_role.control_plane.arn

  enabled_cluster_log_types = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
  # The add-ons are ours from the first minute, each with its own role.
  bootstrap_self_managed_addons = false

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = false
  }

  encryption_config {
    resources = ["secrets"]
    provider {
      key_arn = aws_kms_key.secrets.arn
    }
  }

  # When standard support ends AWS upgrades the cluster, instead of charging six times the price.
  upgrade_policy {
    support_type = "STANDARD"
  }

  zonal_shift_config {
    enabled = true
  }

  vpc_config {
    subnet_ids              = [for subnet in aws_subnet.control_plane : subnet.id]
    security_group_ids      = [aws_security_group.control_plane.id]
    endpoint_private_access = true
    endpoint_public_access  = length(var.public_access_cidrs) > 0
    # While public access is off, AWS keeps its own list and opens nothing.
    public_access_cidrs = length(var.public_access_cidrs) > 0 ? var.public_access_cidrs : null
  }

  depends_on = [aws_iam_role_policy_attachment.control_plane, aws_cloudwatch_log_group.control_plane]
}

resource "aws_security_group" "control_plane" {
  name        = "${var.name}-control-plane"
  description = "The control plane's interfaces"
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-control-plane" }
}

resource "aws_vpc_security_group_ingress_rule" "api_from_nodes" {
  security_group_id            = aws_security_group.control_plane.id
  description                  = "The Kubernetes API, from nodes and pods"
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
}

# What the control plane calls on nodes. A webhook on another port is not reached: add its port here.
locals {
  control_plane_calls = {
    "443"   = "Services behind the API aggregation"
    "8082"  = "Kueue's visibility API; unreachable, it would hold up the removal of every namespace"
    "8443"  = "Admission webhooks"
    "9443"  = "Admission webhooks: KServe, Kueue, Envoy Gateway"
    "10250" = "Kubelets: logs and exec; webhooks of External Secrets and the Prometheus operator"
    "10251" = "metrics-server"
  }
}

resource "aws_vpc_security_group_egress_rule" "control_plane_to_nodes" {
  for_each                     = local.control_plane_calls
  security_group_id            = aws_security_group.control_plane.id
  description                  = each.value
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "tcp"
  from_port                    = tonumber(each.key)
  to_port                      = tonumber(each.key)
}
