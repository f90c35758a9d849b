"""What schemathesis makes of the server's OpenAPI document; needs the extra `fuzz`."""
