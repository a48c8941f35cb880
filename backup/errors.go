package backup

import "errors"

var (
	// ErrNotBackup is a file that is no backup, or one that is cut off within its first bytes.
	ErrNotBackup = errors.New("not a backup, or damaged at its start")
	// ErrPassphrase is a passphrase that does not open the file.
	ErrPassphrase = errors.New("wrong passphrase")
	// ErrDamaged is a backup that is not whole.
	ErrDamaged = errors.New("the backup is damaged or cut off")
	// ErrNewerFormat is a backup in a format that came after this program.
	ErrNewerFormat = errors.New("the backup is in a newer format")
	// ErrNoIdentity is a backup of a node that was in no cluster.
	ErrNoIdentity = errors.New("the backup is of a node in no cluster")
	// ErrNothing is a node that has no configuration to back up: it has joined, and was not pushed to yet.
	ErrNothing = errors.New("this node has no configuration yet")
	// ErrChanging is a node whose keys and database name different nodes: a join or restore is under way.
	ErrChanging = errors.New("keys and database are of different nodes")
)
