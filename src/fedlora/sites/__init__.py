"""What a real site and a real server are made of besides an engine: keys, settings, data, agreement and limits."""
