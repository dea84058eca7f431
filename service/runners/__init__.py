"""Runners execute the stages of a bundle. All implement one interface (`base.Runner`) and give the same answers."""
