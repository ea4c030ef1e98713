# A small PostgreSQL each for Dagster and MLflow. Both can be rebuilt from the artifacts' records; two databases, since
# each migrates its own. AWS makes the passwords, keeps them in Secrets Manager and changes them every week.

locals {
  databases     = ["dagster", "mlflow"]
  database_logs = ["postgresql", "upgrade"]
}

resource "aws_db_subnet_group" "metadata" {
  name       = "${var.name}-metadata"
  subnet_ids = [for subnet in aws_subnet.control_plane : subnet.id]
}

resource "aws_security_group" "metadata" {
  name        = "${var.name}-metadata"
  description = "PostgreSQL of Dagster and MLflow: from the nodes"
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-metadata" }
}

resource "aws_vpc_security_group_ingress_rule" "metadata" {
  security_group_id            = aws_security_group.metadata.id
  description                  = "PostgreSQL from nodes and pods"
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_vpc_security_group_egress_rule" "nodes_to_metadata" {
  security_group_id            = aws_security_group.nodes.id
  description                  = "PostgreSQL"
  referenced_security_group_id = aws_security_group.metadata.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_db_parameter_group" "metadata" {
  name   = "${var.name}-metadata"
  family = "postgres17"
  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
  parameter {
    name  = "log_statement"
    value = "ddl"
  }
  parameter {
    name  = "log_min_duration_statement"
    value = "1000"
  }
}

resource "aws_db_instance" "metadata" {
  # checkov:skip=CKV_AWS_118: enhanced monitoring costs more than it tells about a database this small
  # checkov:skip=CKV_AWS_353: performance insights cost more than they tell about a database this small
  # checkov:skip=CKV_AWS_161: Dagster and MLflow sign in with the password that AWS rotates
  # checkov:skip=CKV_AWS_293: deletion protection follows keep_data, true by default
  for_each                        = toset(local.databases)
  identifier                      = "${var.name}-${each.key}"
  db_name                         = each.key
  engine                          = "postgres"
  engine_version                  = "17"
  instance_class                  = "db.t4g.micro"
  allocated_storage               = 20
  max_allocated_storage           = 100
  storage_type                    = "gp3"
  storage_encrypted               = true
  kms_key_id                      = aws_kms_key.data.arn
  multi_az                        = true
  db_subnet_group_name            = aws_db_subnet_group.metadata.name
  vpc_security_group_ids          = [aws_security_group.metadata.id]
  parameter_group_name            = aws_db_parameter_group.metadata.name
  publicly_accessible             = false
  username                        = each.key
  manage_master_user_password     = true
  master_user_secret_kms_key_id   = aws_kms_key.data.arn
  auto_minor_version_upgrade      = true
  backup_retention_period         = 14
  copy_tags_to_snapshot           = true
  enabled_cloudwatch_logs_exports = local.database_logs
  deletion_protection             = var.keep_data
  skip_final_snapshot             = !var.keep_data
  final_snapshot_identifier       = "${var.name}-${each.key}-last"
  depends_on                      = [aws_cloudwatch_log_group.metadata]
}
