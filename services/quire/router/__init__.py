"""The router: knows which engine holds which pages, sends each request where its first token comes soonest."""
