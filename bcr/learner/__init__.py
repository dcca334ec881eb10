"""From judged rollouts to an optimizer step: advantages, packs, losses."""
