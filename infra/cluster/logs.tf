# Every group exists before its writer does: a group that AWS makes by itself is not encrypted and is kept for ever.

resource "aws_cloudwatch_log_group" "control_plane" {
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = 365
  kms_key_id        = aws_kms_key.data.arn
}

resource "aws_cloudwatch_log_group" "flow" {
  name              = "/fmops/${var.name}/flow"
  retention_in_days = 365
  kms_key_id        = aws_kms_key.data.arn
}

resource "aws_cloudwatch_log_group" "pods" {
  name              = "/fmops/${var.name}/pods"
  retention_in_days = 365
  kms_key_id        = aws_kms_key.data.arn
}

resource "aws_cloudwatch_log_group" "metadata" {
  for_each          = toset([for pair in setproduct(local.databases, local.database_logs) : join("/", pair)])
  name              = "/aws/rds/instance/${var.name}-${each.key}"
  retention_in_days = 365
  kms_key_id        = aws_kms_key.data.arn
}
