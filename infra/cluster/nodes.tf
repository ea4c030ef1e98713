# Three small nodes hold what must run before Karpenter can: DNS, Karpenter, Argo CD. All else runs on Karpenter's.

resource "aws_iam_role" "nodes" {
  name               = "${var.name}-nodes"
  assume_role_policy = jsonencode({ Version = "2012-10-17", Statement = [local.ec2_assumes] })
}

# Its own role: the access entry of a managed node group's role belongs to EKS.
resource "aws_iam_role" "system_nodes" {
  name               = "${var.name}-system-nodes"
  assume_role_policy = jsonencode({ Version = "2012-10-17", Statement = [local.ec2_assumes] })
}

locals {
  ec2_assumes = { Effect = "Allow", Principal = { Service = "ec2.amazonaws.com" }, Action = "sts:AssumeRole" }
  # The network plug-in has a role of its own (addons.tf), so that no pod can borrow its rights from the node.
  node_policies = {
    for pair in setproduct([aws_iam_role.nodes.name, aws_iam_role.system_nodes.name], ["AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly"]) :
    join("/", pair) => { role = pair[0], policy = pair[1] }
  }
}

resource "aws_iam_role_policy_attachment" "nodes" {
  for_each   = local.node_policies
  role       = each.value.role
  policy_arn = "arn:${local.partition}:iam::aws:policy/${each.value.policy}"
}

resource "aws_iam_instance_profile" "nodes" {
  name = "${var.name}-nodes"
  role = aws_iam_role.nodes.name
}

resource "aws_security_group" "nodes" {
  name        = "${var.name}-nodes"
  description = "Nodes and their pods"
  vpc_id      = aws_vpc.this.id
  # By the second tag AWS's load balancer controller knows which group to open for the gateway.
  tags = { Name = "${var.name}-nodes", "kubernetes.io/cluster/${var.name}" = "owned" }
}

resource "aws_vpc_security_group_ingress_rule" "nodes_from_nodes" {
  security_group_id            = aws_security_group.nodes.id
  description                  = "Nodes and pods among themselves; network policies narrow it"
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_ingress_rule" "nodes_from_control_plane" {
  for_each                     = local.control_plane_calls
  security_group_id            = aws_security_group.nodes.id
  description                  = each.value
  referenced_security_group_id = aws_security_group.control_plane.id
  ip_protocol                  = "tcp"
  from_port                    = tonumber(each.key)
  to_port                      = tonumber(each.key)
}

resource "aws_vpc_security_group_egress_rule" "nodes_to_nodes" {
  security_group_id            = aws_security_group.nodes.id
  description                  = "Nodes and pods among themselves"
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.nodes.id
  description       = "HTTPS out: the Kubernetes API, AWS, Git, charts, model hubs"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_launch_template" "system" {
  name                   = "${var.name}-system"
  vpc_security_group_ids = [aws_security_group.nodes.id]
  update_default_version = true

  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    http_endpoint               = "enabled"
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_type           = "gp3"
      volume_size           = 50
      encrypted             = true
      delete_on_termination = true
    }
  }

  tag_specifications {
    resource_type = "instance"
    tags          = merge(local.tags, { Name = "${var.name}-system" })
  }

  tag_specifications {
    resource_type = "volume"
    tags          = local.tags
  }
}

resource "aws_eks_node_group" "system" {
  cluster_name    = aws_eks_cluster.this.name
  node_group_name = "system"
  node_role_arn   = aws_iam_role.system_nodes.arn
  subnet_ids      = [for subnet in aws_subnet.nodes : subnet.id]
  ami_type        = "AL2023_x86_64_STANDARD"
  instance_types  = ["m7i.large"]
  capacity_type   = "ON_DEMAND"
  labels          = { "fmops/pool" = "system" }

  launch_template {
    id      = aws_launch_template.system.id
    version = aws_launch_template.system.latest_version
  }

  scaling_config {
    min_size     = 3
    desired_size = 3
    max_size     = 6
  }

  update_config {
    max_unavailable = 1
  }

  # A node without the network plug-in never gets ready, and a pod without the identity agent gets no role.
  depends_on = [aws_iam_role_policy_attachment.nodes, aws_eks_addon.before_nodes]
}
