"""What a worker serves: health, metrics and OpenAI's webhook, on ports that strangers may reach."""
