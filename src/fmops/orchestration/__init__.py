"""From the spec to runs: graph, plan, launch, lineage, tracking."""
