profile            = "gpu"
name               = "fmops"
account_id         = "111122223333"
region             = "us-east-1"
zones              = ["us-east-1a", "us-east-1b", "us-east-1c"]
node_image_version = "v20260801" # `make image-version`
administrators     = ["arn:aws:iam::111122223333:role/PlatformAdmin"]
monthly_budget_usd = 20000
alert_emails       = ["platform@example.com"]

# Paid from the first minute, used or not, until the end:
# capacity_reservations = {
#   training = { instance_type = "p5.48xlarge", zone = "us-east-1a", count = 2, ends = "2026-12-31T00:00:00Z" }
# }
# lustre = { capacity_gib = 2400, throughput_mbps_per_tib = 250 }
