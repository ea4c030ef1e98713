output "name" {
  description = "The cluster's name, for `make destroy`."
  value       = var.name
}

output "region" {
  description = "The cluster's region, for `make destroy`."
  value       = var.region
}

output "kubeconfig" {
  description = "The command that lets kubectl reach the cluster, from inside the network or an allowed range."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}

# Everything the platform must know of the account, as the values of its charts: `make platform-values` writes the file.
output "platform" {
  description = "The content of infra/platform/cluster.yaml."
  value = yamlencode({
    cluster = {
      name              = aws_eks_cluster.this.name
      endpoint          = aws_eks_cluster.this.endpoint
      region            = var.region
      profile           = var.profile
      zones             = var.zones
      nodeImage         = "al2023@${var.node_image_version}"
      instanceProfile   = aws_iam_instance_profile.nodes.name
      interruptionQueue = aws_sqs_queue.interruptions.name
      subnets           = [for zone in var.zones : aws_subnet.nodes[zone].id]
      securityGroup     = aws_security_group.nodes.id
      efaSecurityGroup  = one(aws_security_group.efa[*].id)
      placementGroup    = one(aws_placement_group.training[*].name)
      reservations = concat(
        [for r in values(aws_ec2_capacity_reservation.this) : r.id],
        [for r in values(aws_ec2_capacity_block_reservation.this) : r.id],
      )
      vpcCidr         = var.vpc_cidr
      registry        = "${var.account_id}.dkr.ecr.${var.region}.amazonaws.com/${var.name}"
      artifactsBucket = aws_s3_bucket.artifacts.id
      podLogGroup     = aws_cloudwatch_log_group.pods.name
      pools           = local.profile.pools
      databases = {
        for name, database in aws_db_instance.metadata : name => {
          host   = database.address
          secret = database.master_user_secret[0].secret_arn
        }
      }
      lustre = one([for fs in aws_fsx_lustre_file_system.this : { id = fs.id, dns = fs.dns_name, mount = fs.mount_name, gib = fs.storage_capacity }])
    }
  })
}
