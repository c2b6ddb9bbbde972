"""K-means over the embeddings of a whole data set, spread over actors."""
