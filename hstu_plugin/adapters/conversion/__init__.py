"""The files of one door as data of another: the only place that knows several doors."""
