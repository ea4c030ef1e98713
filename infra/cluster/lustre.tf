# Optional: S3 seen as a fast file system. Files are read from the bucket at first use and changes go back to it.

resource "aws_security_group" "lustre" {
  count       = var.lustre == null ? 0 : 1
  name        = "${var.name}-lustre"
  description = "FSx for Lustre: its ports, from the nodes and itself"
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-lustre" }
}

locals {
  lustre_rules = var.lustre == null ? {} : {
    for pair in setproduct(["nodes", "lustre"], ["988-988", "1018-1023"]) : join("-", pair) => {
      group = pair[0] == "nodes" ? aws_security_group.nodes.id : aws_security_group.lustre[0].id
      from  = tonumber(split("-", pair[1])[0])
      to    = tonumber(split("-", pair[1])[1])
      node  = pair[0] == "nodes"
    }
  }
}

resource "aws_vpc_security_group_ingress_rule" "lustre" {
  for_each                     = local.lustre_rules
  security_group_id            = aws_security_group.lustre[0].id
  description                  = "Lustre"
  referenced_security_group_id = each.value.group
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_egress_rule" "lustre" {
  for_each                     = local.lustre_rules
  security_group_id            = aws_security_group.lustre[0].id
  description                  = "Lustre"
  referenced_security_group_id = each.value.group
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_egress_rule" "nodes_to_lustre" {
  for_each                     = { for name, rule in local.lustre_rules : name => rule if rule.node }
  security_group_id            = aws_security_group.nodes.id
  description                  = "Lustre"
  referenced_security_group_id = aws_security_group.lustre[0].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_vpc_security_group_ingress_rule" "lustre_to_nodes" {
  for_each                     = { for name, rule in local.lustre_rules : name => rule if rule.node }
  security_group_id            = aws_security_group.nodes.id
  description                  = "Lustre's calls back to its clients"
  referenced_security_group_id = aws_security_group.lustre[0].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.from
  to_port                      = each.value.to
}

resource "aws_fsx_lustre_file_system" "this" {
  count                           = var.lustre == null ? 0 : 1
  deployment_type                 = "PERSISTENT_2"
  storage_type                    = "SSD"
  storage_capacity                = var.lustre.capacity_gib
  per_unit_storage_throughput     = var.lustre.throughput_mbps_per_tib
  data_compression_type           = "LZ4"
  file_system_type_version        = "2.15"
  kms_key_id                      = aws_kms_key.data.arn
  subnet_ids                      = [aws_subnet.nodes[var.zones[0]].id]
  security_group_ids              = [aws_security_group.lustre[0].id]
  automatic_backup_retention_days = 0
  tags                            = { Name = var.name }
}

resource "aws_fsx_data_repository_association" "artifacts" {
  count                = var.lustre == null ? 0 : 1
  file_system_id       = aws_fsx_lustre_file_system.this[0].id
  data_repository_path = "s3://${aws_s3_bucket.artifacts.id}/data"
  file_system_path     = "/data"
  s3 {
    auto_import_policy {
      events = ["NEW", "CHANGED", "DELETED"]
    }
    # What is deleted on the file system stays in the bucket.
    auto_export_policy {
      events = ["NEW", "CHANGED"]
    }
  }
}
