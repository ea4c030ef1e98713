# Copy to terraform.tfvars, fill in what is yours. What is not here has a default that is safe.
profile            = "cpu"
name               = "fmops"
account_id         = "111122223333"
region             = "us-east-1"
zones              = ["us-east-1a", "us-east-1b", "us-east-1c"]
node_image_version = "v20260801" # `make image-version`
administrators     = ["arn:aws:iam::111122223333:role/PlatformAdmin"]
monthly_budget_usd = 1500
alert_emails       = ["platform@example.com"]
