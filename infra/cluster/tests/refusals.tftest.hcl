# Each variable refuses what would cost money, open the cluster, or break later.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
}

mock_provider "aws" {
  alias = "billing"
}

variables {
  profile            = "cpu"
  name               = "fmops"
  account_id         = "111122223333"
  region             = "us-east-1"
  zones              = ["us-east-1a", "us-east-1b", "us-east-1c"]
  node_image_version = "v20260801"
  administrators     = ["arn:aws:iam::111122223333:role/PlatformAdmin"]
  monthly_budget_usd = 1500
  alert_emails       = ["platform@example.com"]
}

run "the_whole_internet" {
  command = plan
  variables {
    public_access_cidrs = ["0.0.0.0/0"]
  }
  expect_failures = [var.public_access_cidrs]
}

run "half_the_internet" {
  command = plan
  variables {
    public_access_cidrs = ["128.0.0.0/1"]
  }
  expect_failures = [var.public_access_cidrs]
}

run "an_engineer_who_is_an_administrator" {
  command = plan
  variables {
    engineers = ["arn:aws:iam::111122223333:role/PlatformAdmin"]
  }
  expect_failures = [var.engineers]
}

run "a_viewer_with_a_long_lived_key" {
  command = plan
  variables {
    viewers = ["arn:aws:iam::111122223333:user/somebody"]
  }
  expect_failures = [var.viewers]
}

run "an_unknown_profile" {
  command = plan
  variables {
    profile = "tpu"
  }
  expect_failures = [var.profile]
}

run "two_zones" {
  command = plan
  variables {
    zones = ["us-east-1a", "us-east-1b"]
  }
  expect_failures = [var.zones]
}

run "a_zone_twice" {
  command = plan
  variables {
    zones = ["us-east-1a", "us-east-1a", "us-east-1b"]
  }
  expect_failures = [var.zones]
}

run "zones_of_another_region" {
  command = plan
  variables {
    zones = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
  }
  expect_failures = [var.zones]
}

run "a_name_that_no_bucket_takes" {
  command = plan
  variables {
    name = "FMOps_1"
  }
  expect_failures = [var.name]
}

run "an_account_that_is_none" {
  command = plan
  variables {
    account_id = "123"
  }
  expect_failures = [var.account_id]
}

run "extended_support" {
  command = plan
  variables {
    kubernetes_version = "1.31"
  }
  expect_failures = [var.kubernetes_version]
}

run "an_image_that_moves" {
  command = plan
  variables {
    node_image_version = "latest"
  }
  expect_failures = [var.node_image_version]
}

run "an_addon_that_is_none" {
  command = plan
  variables {
    addon_versions = { vpc-cin = "v1.20.0-eksbuild.1" }
  }
  expect_failures = [var.addon_versions]
}

run "public_addresses_inside" {
  command = plan
  variables {
    vpc_cidr = "8.8.0.0/16"
  }
  expect_failures = [var.vpc_cidr]
}

run "a_network_too_small" {
  command = plan
  variables {
    vpc_cidr = "10.0.0.0/24"
  }
  expect_failures = [var.vpc_cidr]
}

run "nobody_administers" {
  command = plan
  variables {
    administrators = []
  }
  expect_failures = [var.administrators]
}

run "a_user_administers" {
  command = plan
  variables {
    administrators = ["arn:aws:iam::111122223333:user/root"]
  }
  expect_failures = [var.administrators]
}

run "a_budget_below_the_idle_price" {
  command = plan
  variables {
    monthly_budget_usd = 10
  }
  expect_failures = [var.monthly_budget_usd]
}

run "an_alarm_that_nobody_gets" {
  command = plan
  variables {
    alert_emails = []
  }
  expect_failures = [var.alert_emails]
}

run "a_reservation_without_end" {
  command = plan
  variables {
    profile               = "gpu"
    capacity_reservations = { a = { instance_type = "p5.48xlarge", zone = "us-east-1a", count = 1, ends = "never" } }
  }
  expect_failures = [var.capacity_reservations]
}

run "a_reservation_of_nothing" {
  command = plan
  variables {
    profile               = "gpu"
    capacity_reservations = { a = { instance_type = "p5.48xlarge", zone = "us-east-1a", count = 0, ends = "2026-12-31T00:00:00Z" } }
  }
  expect_failures = [var.capacity_reservations]
}

run "a_reservation_where_no_subnet_is" {
  command = plan
  variables {
    profile               = "gpu"
    capacity_reservations = { a = { instance_type = "p5.48xlarge", zone = "us-east-1f", count = 1, ends = "2026-12-31T00:00:00Z" } }
  }
  expect_failures = [var.capacity_reservations]
}

run "a_reservation_that_no_pool_uses" {
  command = plan
  variables {
    profile               = "neuron"
    capacity_reservations = { a = { instance_type = "p5.48xlarge", zone = "us-east-1a", count = 1, ends = "2026-12-31T00:00:00Z" } }
  }
  expect_failures = [var.capacity_reservations]
}

run "a_block_that_is_no_offering" {
  command = plan
  variables {
    profile         = "gpu"
    capacity_blocks = { a = "cr-0123456789abcdef0" }
  }
  expect_failures = [var.capacity_blocks]
}

run "a_block_without_a_pool" {
  command = plan
  variables {
    capacity_blocks = { a = "cb-0123456789abcdef0" }
  }
  expect_failures = [var.capacity_blocks]
}

run "a_file_system_of_an_odd_size" {
  command = plan
  variables {
    lustre = { capacity_gib = 2000, throughput_mbps_per_tib = 250 }
  }
  expect_failures = [var.lustre]
}

run "a_file_system_of_an_odd_speed" {
  command = plan
  variables {
    lustre = { capacity_gib = 1200, throughput_mbps_per_tib = 300 }
  }
  expect_failures = [var.lustre]
}

run "a_region_that_is_a_zone" {
  command = plan
  variables {
    region = "us-east-1a"
    zones  = ["us-east-1a1", "us-east-1a2", "us-east-1a3"]
  }
  expect_failures = [var.region]
}
