# Each profile, planned against a mocked AWS: what it makes, and what it must not make.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
}

mock_provider "aws" {
  alias = "billing"
}

variables {
  name               = "fmops"
  account_id         = "111122223333"
  region             = "us-east-1"
  zones              = ["us-east-1a", "us-east-1b", "us-east-1c"]
  node_image_version = "v20260801"
  administrators     = ["arn:aws:iam::111122223333:role/PlatformAdmin"]
  monthly_budget_usd = 1500
  alert_emails       = ["platform@example.com"]
}

run "cpu" {
  command = plan
  variables {
    profile = "cpu"
  }

  assert {
    condition     = length(aws_placement_group.training) == 0 && length(aws_security_group.efa) == 0
    error_message = "The profile cpu pays for no fabric."
  }
  assert {
    condition     = keys(local.profile.pools) == ["cpu"]
    error_message = "The profile cpu has one node pool."
  }
  assert {
    condition     = length(aws_fsx_lustre_file_system.this) == 0 && length(aws_ec2_capacity_reservation.this) == 0
    error_message = "Nothing that costs by the hour comes without being named."
  }

  # Security, the same in each profile.
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "The API endpoint is private by default."
  }
  assert {
    condition     = length(aws_eks_cluster.this.enabled_cluster_log_types) == 5
    error_message = "All five logs of the control plane are kept."
  }
  assert {
    condition     = aws_eks_cluster.this.encryption_config[0].resources == toset(["secrets"])
    error_message = "Kubernetes secrets are encrypted with our key."
  }
  assert {
    condition     = aws_eks_cluster.this.access_config[0].authentication_mode == "API" && !aws_eks_cluster.this.access_config[0].bootstrap_cluster_creator_admin_permissions
    error_message = "Access is by entries alone; the creator is no administrator."
  }
  assert {
    condition     = aws_eks_cluster.this.upgrade_policy[0].support_type == "STANDARD"
    error_message = "Extended support costs six times as much and is never entered silently."
  }
  assert {
    condition     = aws_launch_template.system.metadata_options[0].http_tokens == "required" && aws_launch_template.system.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "IMDSv2 with one hop: a pod cannot take the node's credentials."
  }
  assert {
    condition     = alltrue([for repository in aws_ecr_repository.this : repository.image_tag_mutability == "IMMUTABLE" && repository.image_scanning_configuration[0].scan_on_push])
    error_message = "Images are immutable and scanned."
  }
  assert {
    condition     = alltrue([for block in aws_s3_bucket_public_access_block.this : block.block_public_acls && block.block_public_policy && block.ignore_public_acls && block.restrict_public_buckets])
    error_message = "No bucket can be made public."
  }
  assert {
    condition     = alltrue([for versioning in aws_s3_bucket_versioning.this : versioning.versioning_configuration[0].status == "Enabled"])
    error_message = "Buckets keep versions."
  }
  assert {
    condition     = !aws_s3_bucket.artifacts.force_destroy && alltrue([for database in aws_db_instance.metadata : database.deletion_protection && !database.skip_final_snapshot])
    error_message = "Data is kept unless keep_data is set to false."
  }
  assert {
    condition     = alltrue([for database in aws_db_instance.metadata : database.manage_master_user_password && database.storage_encrypted && !database.publicly_accessible])
    error_message = "Databases have no password of ours, are encrypted and private."
  }
  assert {
    condition     = alltrue([for subnet in aws_subnet.public : subnet.map_public_ip_on_launch == false]) && length(distinct([for subnet in aws_subnet.nodes : subnet.cidr_block])) == 3
    error_message = "Nothing gets a public address by default; each zone has its own range."
  }
  assert {
    condition     = length(aws_nat_gateway.this) == 3 && length(aws_vpc_endpoint.interface) == 11
    error_message = "Each zone has its own way out; AWS's services are reached inside."
  }
  assert {
    condition     = aws_budgets_budget.this.limit_amount == "1500" && aws_cloudwatch_metric_alarm.bill.threshold == 1500
    error_message = "Budget and alarm stand at the sum that was named."
  }
}

run "gpu" {
  command = plan
  variables {
    profile = "gpu"
    capacity_reservations = {
      training = { instance_type = "p5.48xlarge", zone = "us-east-1a", count = 2, ends = "2026-12-31T00:00:00Z" }
    }
    capacity_blocks = { sprint = "cb-0123456789abcdef0" }
    lustre          = { capacity_gib = 2400, throughput_mbps_per_tib = 250 }
  }

  assert {
    condition     = aws_placement_group.training[0].strategy == "cluster"
    error_message = "Training nodes stand close together."
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.efa[0].ip_protocol == "-1" && aws_vpc_security_group_egress_rule.efa[0].ip_protocol == "-1"
    error_message = "EFA needs all traffic among members, both ways."
  }
  assert {
    condition     = keys(local.profile.pools) == ["cpu", "gpu-inference", "gpu-training"]
    error_message = "The profile gpu has pools for serving and for training."
  }
  assert {
    condition     = aws_ec2_capacity_reservation.this["training"].instance_match_criteria == "targeted" && aws_ec2_capacity_reservation.this["training"].end_date_type == "limited"
    error_message = "A reservation is used by who names it, and ends."
  }
  assert {
    condition     = contains(keys(aws_eks_addon.on_nodes), "aws-fsx-csi-driver") && length(aws_vpc_security_group_egress_rule.nodes_to_lustre) == 2
    error_message = "With Lustre come its driver and its ports."
  }
}

run "neuron" {
  command = plan
  variables {
    profile = "neuron"
  }

  assert {
    condition     = length(aws_placement_group.training) == 1 && keys(local.profile.pools) == ["cpu", "neuron-inference", "neuron-training"]
    error_message = "The profile neuron has the fabric and its two pools."
  }
}

run "an_allowed_range_opens_the_endpoint_to_that_range_alone" {
  command = plan
  variables {
    profile             = "cpu"
    public_access_cidrs = ["198.51.100.0/28"]
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["198.51.100.0/28"])
    error_message = "Exactly the named range is let in."
  }
}

run "data_may_go_when_it_is_said" {
  command = plan
  variables {
    profile   = "cpu"
    keep_data = false
  }

  assert {
    condition     = aws_s3_bucket.artifacts.force_destroy && alltrue([for repository in aws_ecr_repository.this : repository.force_delete])
    error_message = "With keep_data = false a destroy goes through."
  }
}
