// Package config holds configuration as values: Local is this node's own file; Snapshot is the replicated configuration at one
// Position, which the database holds as rows and the mail path uses compiled. It validates both and reads and writes them as text.
package config
