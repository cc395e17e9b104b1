"""A KV connector that lives in a package of its own."""
