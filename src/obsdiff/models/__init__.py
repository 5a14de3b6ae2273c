"""Where diffusers enters: loading pipelines, what is known of each family, and small pipelines made from scratch."""
