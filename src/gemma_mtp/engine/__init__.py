"""From a request to its tokens: pairs of models and the loop that decodes with them."""
