"""Tools: what a client offers (`choice`), how a model is told of them (`prompt`), made to call them (`grammar`) and
understood when it does (`parser`)."""
