"""What each stage of a generation does, by the paper's phases; `generation.compose` puts the stages together."""
