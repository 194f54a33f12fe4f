"""OpenAI's wire format: its JSON in (`types`, `requests`), its JSON out (`responses`), its errors (`errors`)."""
