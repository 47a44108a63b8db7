"""Files of requests in OpenAI's batch format, answered through the same app as the server's own requests."""
