"""DiLoCo: inner steps on each replica, an outer step on their mean change."""
