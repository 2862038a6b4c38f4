"""RecBole configurations: ``hstu.yaml`` holds the model's defaults, the other files are recipes for data sets."""
