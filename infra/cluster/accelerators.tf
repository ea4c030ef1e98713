# What training over many nodes needs: nodes close together, the fabric between them, and capacity that is there.

resource "aws_placement_group" "training" {
  count    = local.profile.efa ? 1 : 0
  name     = "${var.name}-training"
  strategy = "cluster"
}

# EFA's traffic passes only between members of one group that allows itself everything, in and out.
resource "aws_security_group" "efa" {
  # checkov:skip=CKV2_AWS_5: Karpenter attaches it to training nodes, which Terraform does not see
  count       = local.profile.efa ? 1 : 0
  name        = "${var.name}-efa"
  description = "Elastic Fabric Adapter among training nodes"
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-efa" }
}

resource "aws_vpc_security_group_ingress_rule" "efa" {
  count                        = local.profile.efa ? 1 : 0
  security_group_id            = aws_security_group.efa[0].id
  description                  = "EFA among training nodes"
  referenced_security_group_id = aws_security_group.efa[0].id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "efa" {
  count                        = local.profile.efa ? 1 : 0
  security_group_id            = aws_security_group.efa[0].id
  description                  = "EFA among training nodes"
  referenced_security_group_id = aws_security_group.efa[0].id
  ip_protocol                  = "-1"
}

resource "aws_ec2_capacity_reservation" "this" {
  for_each                = var.capacity_reservations
  instance_type           = each.value.instance_type
  instance_platform       = "Linux/UNIX"
  availability_zone       = each.value.zone
  instance_count          = each.value.count
  instance_match_criteria = "targeted"
  end_date_type           = "limited"
  end_date                = each.value.ends
  tags                    = { Name = "${var.name}-${each.key}", "fmops/reservation" = each.key }
}

resource "aws_ec2_capacity_block_reservation" "this" {
  for_each                   = var.capacity_blocks
  capacity_block_offering_id = each.value
  instance_platform          = "Linux/UNIX"
  tags                       = { Name = "${var.name}-${each.key}", "fmops/reservation" = each.key }
}
