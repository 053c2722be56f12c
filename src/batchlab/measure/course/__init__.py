"""What a run says of itself while it goes: rates that train, Adam's stability, the distance travelled."""
