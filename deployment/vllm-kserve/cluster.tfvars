# What infra/cluster/terraform.tfvars says for this case, beside the account's own lines: two nodes that AWS keeps for us.
profile = "gpu"

# Paid from apply to the end, used or not.
capacity_reservations = {
  assistant = { instance_type = "g6.xlarge", zone = "us-east-1a", count = 2, ends = "2027-03-31T00:00:00Z" }
}
