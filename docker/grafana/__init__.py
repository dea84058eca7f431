"""The dashboard as code: `dashboard` writes it, `ask` asks its queries."""
