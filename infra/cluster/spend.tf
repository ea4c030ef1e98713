# Who is told about money, and when. Bills lag by hours: what stops spending at once is the limit of each node pool.

resource "aws_sns_topic" "spend" {
  name              = "${var.name}-spend"
  kms_master_key_id = aws_kms_key.data.arn
}

resource "aws_sns_topic_policy" "spend" {
  arn = aws_sns_topic.spend.arn
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "Budgets"
      Effect    = "Allow"
      Principal = { Service = "budgets.amazonaws.com" }
      Action    = "sns:Publish"
      Resource  = aws_sns_topic.spend.arn
      Condition = { StringEquals = { "aws:SourceAccount" = var.account_id } }
    }]
  })
}

resource "aws_sns_topic_subscription" "spend" {
  for_each  = var.alert_emails
  topic_arn = aws_sns_topic.spend.arn
  protocol  = "email"
  endpoint  = each.key
}

resource "aws_budgets_budget" "this" {
  name         = var.name
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = tostring(var.monthly_budget_usd)
  limit_unit   = "USD"

  dynamic "notification" {
    for_each = [[50, "ACTUAL"], [80, "ACTUAL"], [100, "ACTUAL"], [100, "FORECASTED"]]
    content {
      threshold                 = notification.value[0]
      notification_type         = notification.value[1]
      threshold_type            = "PERCENTAGE"
      comparison_operator       = "GREATER_THAN"
      subscriber_sns_topic_arns = [aws_sns_topic.spend.arn]
    }
  }
}

# The bill's own metric, of the whole account. It needs «Receive billing alerts» in the account's billing preferences.
resource "aws_sns_topic" "bill" {
  # checkov:skip=CKV_AWS_26: the message is one number; CloudWatch alarms cannot publish to a topic under the AWS-managed key, and the cluster's key is in another region
  provider = aws.billing
  name     = "${var.name}-bill"
}

resource "aws_sns_topic_subscription" "bill" {
  provider  = aws.billing
  for_each  = var.alert_emails
  topic_arn = aws_sns_topic.bill.arn
  protocol  = "email"
  endpoint  = each.key
}

resource "aws_cloudwatch_metric_alarm" "bill" {
  provider            = aws.billing
  alarm_name          = "${var.name}-bill"
  alarm_description   = "The account's estimated charges of this month are over the budget of ${var.name}"
  namespace           = "AWS/Billing"
  metric_name         = "EstimatedCharges"
  dimensions          = { Currency = "USD" }
  statistic           = "Maximum"
  period              = 21600
  evaluation_periods  = 1
  comparison_operator = "GreaterThanThreshold"
  threshold           = var.monthly_budget_usd
  treat_missing_data  = "missing"
  alarm_actions       = [aws_sns_topic.bill.arn]
}
