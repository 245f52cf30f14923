"""What a data set is and how its images are found, ordered, decoded, encoded and named."""
