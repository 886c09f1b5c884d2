"""What the doctor looks at, one file a subject; every check gives findings and none of them raises."""
