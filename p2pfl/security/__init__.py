"""Who may talk to a peer: keys, the list of peers, encrypted links, and limits on them."""
