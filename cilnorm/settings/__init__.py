"""What users may set and what it means; how a spec is told from another."""
