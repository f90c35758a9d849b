"""How results are looked at: as text in a notebook or terminal, as a table, and as plots (`jaxgen.plot`)."""
