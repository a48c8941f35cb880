package backup

import (
	"context"
	"fmt"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// Single gives a single node the backup's configuration in place of its own. Killed at any time, it was done or it was not.
func (b *Backup) Single(ctx context.Context, d *db.DB, a db.Author) (config.Position, error) {
	return d.RestoreSingle(ctx, b.params(a), b.walk)
}

// HasIdentity gives ErrNoIdentity where the backup is of a node in no cluster, and ErrDamaged where its keys are not those of the node
// that its database is of.
func (b *Backup) HasIdentity() error {
	if b.State.CID == 0 {
		return ErrNoIdentity
	}
	if err := whole(b.State, b.files); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// Identity makes a single node the one that the backup is of; see the package's own words for where it comes back. Killed at any time
// it can be run again.
func (b *Backup) Identity(ctx context.Context, d *db.DB, keyDir string) error {
	if err := b.HasIdentity(); err != nil {
		return err
	}
	if err := d.RestoreIdentity(ctx, b.params(db.Author{}), b.walk); err != nil {
		return err
	}
	if err := tunnel.WriteKeyFiles(keyDir, keysOf(b.files)); err != nil {
		return fmt.Errorf("put the keys back: %w", err)
	}
	return d.KeysRestored(ctx)
}

// TLS gives key and certificate of STARTTLS; nil where the node had none.
func (b *Backup) TLS() []byte { return b.files[tlsFile] }

func (b *Backup) params(a db.Author) db.RestoreParams {
	key, _ := tunnel.PrivateKeyOf(keysOf(b.files)) // without one the secrets do not open, which says so
	return db.RestoreParams{Dump: b.Dump, MadeAt: b.MadeAt, NodeKey: key, Author: a}
}
