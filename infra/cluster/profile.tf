# What the three profiles differ in, in one table; the platform's node pools read it through the output `platform`.

locals {
  profiles = {
    cpu = {
      efa        = false
      reservable = "^$"
      # The hard ceiling of what Karpenter may run, in vCPU: the only limit on spend that acts at once.
      pools = { cpu = 256 }
    }
    gpu = {
      efa        = true
      reservable = "^(g[5-9]|p[4-9])[a-z0-9-]*\\."
      pools      = { cpu = 256, gpu-inference = 384, gpu-training = 768 }
    }
    neuron = {
      efa        = true
      reservable = "^(inf2|trn[1-9])[a-z0-9-]*\\."
      pools      = { cpu = 256, neuron-inference = 384, neuron-training = 512 }
    }
  }
  profile = local.profiles[var.profile]

  tags = { project = var.name, managed-by = "terraform", profile = var.profile }
  zone = { for index, name in var.zones : name => index }
}

data "aws_partition" "current" {}

locals {
  partition = data.aws_partition.current.partition
  root_arn  = "arn:${local.partition}:iam::${var.account_id}:root"
}
