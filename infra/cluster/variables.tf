variable "name" {
  type        = string
  description = "Names the cluster and, as a prefix, everything that belongs to it."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name is \"${var.name}\"; it takes 3 to 20 lower-case letters, digits and hyphens, and starts with a letter."
  }
}

variable "account_id" {
  type        = string
  description = "The AWS account to build in. With credentials of another account, every plan is refused."
  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id is \"${var.account_id}\"; it has twelve digits."
  }
}

variable "region" {
  type        = string
  description = "The region of everything but the bill's alarm. Look first whether it has the accelerators you need."
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region is \"${var.region}\"; write it like us-east-1."
  }
}

variable "zones" {
  type        = list(string)
  description = "Three availability zones of the region. The first holds the placement group and the file system."
  validation {
    condition     = length(distinct(var.zones)) == 3 && alltrue([for zone in var.zones : startswith(zone, var.region)])
    error_message = "zones are ${join(", ", var.zones)}; name three different zones of ${var.region}."
  }
}

variable "profile" {
  type        = string
  description = "What the cluster is for: cpu (no accelerators), gpu (NVIDIA g and p families), neuron (inf2 and trn)."
  validation {
    condition     = contains(["cpu", "gpu", "neuron"], var.profile)
    error_message = "profile is \"${var.profile}\"; the profiles are cpu, gpu and neuron."
  }
}

variable "kubernetes_version" {
  type        = string
  description = "The minor version of the control plane. Move one minor at a time; the platform is checked against 1.36."
  default     = "1.36"
  validation {
    condition     = contains(["1.35", "1.36", "1.37"], var.kubernetes_version)
    error_message = "kubernetes_version is \"${var.kubernetes_version}\"; the platform is checked against 1.35, 1.36 and 1.37. Older ones cost six times as much (extended support)."
  }
}

variable "node_image_version" {
  type        = string
  description = "The release of Amazon's EKS-optimised AL2023 images for Karpenter's nodes, such as v20260801. `make image-version` names the newest. No default: an image that moves by itself replaces nodes under running training."
  validation {
    condition     = can(regex("^v20[0-9]{6}$", var.node_image_version))
    error_message = "node_image_version is \"${var.node_image_version}\"; write a release like v20260801, never latest (`make image-version` names the newest)."
  }
}

variable "addon_versions" {
  type        = map(string)
  description = "Exact versions of EKS add-ons, such as {coredns = \"v1.12.4-eksbuild.1\"}. What is not named gets the default of the Kubernetes version when it is created, and stays there."
  default     = {}
  validation {
    condition = length(setsubtract(keys(var.addon_versions), [
      "vpc-cni", "kube-proxy", "coredns", "eks-pod-identity-agent", "aws-ebs-csi-driver", "metrics-server", "aws-fsx-csi-driver",
    ])) == 0
    error_message = "addon_versions names ${join(", ", keys(var.addon_versions))}; the add-ons are vpc-cni, kube-proxy, coredns, eks-pod-identity-agent, aws-ebs-csi-driver, metrics-server and aws-fsx-csi-driver."
  }
}

variable "vpc_cidr" {
  type        = string
  description = "The address range of the network: /16 gives each zone 16,384 addresses for nodes and pods."
  default     = "10.64.0.0/16"
  validation {
    condition     = can(cidrnetmask(var.vpc_cidr)) && can(regex("^(10|172|192)\\..*/1[6-8]$", var.vpc_cidr))
    error_message = "vpc_cidr is \"${var.vpc_cidr}\"; it takes a private range of /16, /17 or /18."
  }
}

variable "administrators" {
  type        = set(string)
  description = "ARNs of the IAM roles that administer the cluster. Whoever runs Terraform gets nothing by that."
  validation {
    condition     = length(var.administrators) > 0 && alltrue([for arn in var.administrators : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/", arn))])
    error_message = "administrators are [${join(", ", var.administrators)}]; name at least one role by its ARN (users have long-lived keys: no)."
  }
}

variable "engineers" {
  type        = set(string)
  description = "ARNs of the IAM roles that send stages to the queue (`fmops run --on eks`): jobs of fmops-train and their logs, nothing else."
  default     = []
  validation {
    condition     = alltrue([for arn in var.engineers : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/", arn)) && !contains(var.administrators, arn) && !contains(var.viewers, arn)])
    error_message = "engineers are [${join(", ", var.engineers)}]; name roles by their ARN, and each in one list only: administrators and viewers are others."
  }
}

variable "viewers" {
  type        = set(string)
  description = "ARNs of the IAM roles that may read the cluster, but no secrets."
  default     = []
  validation {
    condition     = alltrue([for arn in var.viewers : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/", arn))])
    error_message = "viewers are [${join(", ", var.viewers)}]; name roles by their ARN."
  }
}

variable "public_access_cidrs" {
  type        = set(string)
  description = "Address ranges that may reach the Kubernetes API from outside, for who has no VPN or peering into the network. Empty: the endpoint is private only."
  default     = []
  validation {
    condition     = alltrue([for range in var.public_access_cidrs : can(cidrnetmask(range)) && try(tonumber(split("/", range)[1]) >= 24, false)])
    error_message = "public_access_cidrs are [${join(", ", var.public_access_cidrs)}]; each takes an IPv4 range of /24 or narrower. The whole internet is never one."
  }
}

variable "monthly_budget_usd" {
  type        = number
  description = "Mails go out at 50, 80 and 100 % of it, and when the forecast passes it; the bill's alarm rings at it. It stops nothing: the limits of the node pools do."
  validation {
    condition     = var.monthly_budget_usd >= 1000
    error_message = "monthly_budget_usd is ${var.monthly_budget_usd}; an idle cluster alone costs about 1,050 (see the table in infra/README.md)."
  }
}

variable "alert_emails" {
  type        = set(string)
  description = "Who is told about money. Each address must confirm the subscription once."
  validation {
    condition     = length(var.alert_emails) > 0 && length(var.alert_emails) <= 10 && alltrue([for mail in var.alert_emails : can(regex("^[^@ ]+@[^@ ]+$", mail))])
    error_message = "alert_emails are [${join(", ", var.alert_emails)}]; name one to ten addresses: an alarm that nobody gets is none."
  }
}

variable "capacity_reservations" {
  type = map(object({
    instance_type = string
    zone          = string
    count         = number
    ends          = string
  }))
  description = "On-demand capacity reservations by name. They cost the full price from the first minute, used or not; hence each has an end, in UTC as 2026-12-31T00:00:00Z."
  default     = {}
  validation {
    condition     = alltrue([for r in values(var.capacity_reservations) : can(formatdate("YYYY", r.ends)) && r.count >= 1 && r.count == floor(r.count)])
    error_message = "Each of capacity_reservations takes a whole count of at least 1 and an end like 2026-12-31T00:00:00Z."
  }
  validation {
    condition     = alltrue([for r in values(var.capacity_reservations) : contains(var.zones, r.zone)])
    error_message = "capacity_reservations name a zone that the cluster has no subnet in; the zones are ${join(", ", var.zones)}."
  }
  validation {
    condition     = alltrue([for r in values(var.capacity_reservations) : can(regex(local.profile.reservable, r.instance_type))])
    error_message = "capacity_reservations hold ${join(", ", [for r in values(var.capacity_reservations) : r.instance_type])}; no node pool of the profile ${var.profile} would use them, and they would be paid for nothing."
  }
}

variable "capacity_blocks" {
  type        = map(string)
  description = "Capacity Blocks to BUY, by name: the offering's id, from `aws ec2 describe-capacity-block-offerings`. The whole price is due at apply and is not given back. Destroy leaves them."
  default     = {}
  validation {
    condition     = alltrue([for id in values(var.capacity_blocks) : can(regex("^cb-[0-9a-f]{17}$", id))])
    error_message = "capacity_blocks are ${join(", ", values(var.capacity_blocks))}; each takes the id of an offering, cb- and seventeen hexadecimal digits."
  }
  validation {
    condition     = length(var.capacity_blocks) == 0 || var.profile != "cpu"
    error_message = "capacity_blocks are accelerators; the profile cpu has no node pool for them."
  }
}

variable "lustre" {
  type = object({
    capacity_gib            = number
    throughput_mbps_per_tib = number
  })
  description = "An FSx for Lustre file system: training on several nodes needs one; its folder data is the artifacts' bucket's, for sets that S3 feeds too slowly. Null: none."
  default     = null
  validation {
    condition     = var.lustre == null ? true : var.lustre.capacity_gib == 1200 || (var.lustre.capacity_gib > 0 && var.lustre.capacity_gib % 2400 == 0)
    error_message = "lustre.capacity_gib is ${try(var.lustre.capacity_gib, 0)}; it takes 1200 or a multiple of 2400."
  }
  validation {
    condition     = var.lustre == null ? true : contains([125, 250, 500, 1000], var.lustre.throughput_mbps_per_tib)
    error_message = "lustre.throughput_mbps_per_tib is ${try(var.lustre.throughput_mbps_per_tib, 0)}; it takes 125, 250, 500 or 1000."
  }
}

variable "keep_data" {
  type        = bool
  description = "Refuse to destroy what holds data: buckets with objects, images, databases. Set to false and apply before a destroy that is meant."
  default     = true
}
