"""Ways to run a job: on the phone, in the cloud, or shared between the two by layers."""
