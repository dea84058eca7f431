"""The dashboard as code: `dashboard` generates it, `ask` runs its queries."""
