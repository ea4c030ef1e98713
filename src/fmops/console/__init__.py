"""The web page of a workspace: what serves, what is proven, what is wrong, and the orders that a person may give."""
