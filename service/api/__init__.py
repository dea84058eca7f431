"""The HTTP face: `app.create_app` puts it together from one file per noun."""
