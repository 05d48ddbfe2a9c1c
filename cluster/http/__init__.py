"""The OpenAI HTTP front. `app.create_app` builds it; importing this package loads nothing."""
