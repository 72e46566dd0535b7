"""The dialect of the OpenAI API: bodies, messages, and answers in its framing."""
