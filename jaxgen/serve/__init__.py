"""`jaxgen serve`: an engine behind HTTP, with the interfaces of OpenAI and of text-generation-inference."""
