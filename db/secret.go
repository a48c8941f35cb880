package db

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"mailproxy/secret"
)

// A keyring says whose keys an edit goes by.
type keyring struct {
	// open gives the key that the data key is unwrapped with.
	open func() (ed25519.PrivateKey, error)
	// self gives the key of this node as it shall be afterwards: in no cluster, it alone is entitled.
	self func() (ed25519.PublicKey, error)
}

func (d *DB) ownKeyring() keyring {
	return keyring{d.ownKey, func() (ed25519.PublicKey, error) {
		key, err := d.ownKey()
		if err != nil {
			return nil, err
		}
		return key.Public().(ed25519.PublicKey), nil
	}}
}

// ownKey reads this node's key; ErrNoDataKey where it cannot be.
func (d *DB) ownKey() (ed25519.PrivateKey, error) {
	if d.nodeKey == nil {
		return nil, fmt.Errorf("%w: no key was given", ErrNoDataKey)
	}
	key, err := d.nodeKey()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoDataKey, err)
	}
	return key, nil
}

// PutSecret seals a secret and stores it; elsewhere it is named secret:NAME. ErrNoDataKey.
func (t *Tx) PutSecret(ctx context.Context, name string, value []byte) error {
	key, err := t.dataKey(ctx)
	if err != nil {
		return err
	}
	return t.exec(ctx, `INSERT INTO config.secret (name, value, key_id) VALUES ($1, $2, $3)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value, key_id = excluded.key_id`, name, key.Seal(name, value), key.ID())
}

// HasSecret says whether there is a secret of that name.
func (t *Tx) HasSecret(ctx context.Context, name string) (there bool, err error) {
	err = t.tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM config.secret WHERE name = $1)", name).Scan(&there)
	return there, mapError(err)
}

// DeleteSecret forgets a secret; with the last one goes the data key.
func (t *Tx) DeleteSecret(ctx context.Context, name string) error {
	if err := t.remove(ctx, "secret "+name, "DELETE FROM config.secret WHERE name = $1", name); err != nil {
		return err
	}
	return t.exec(ctx, "DELETE FROM config.secret_key WHERE NOT EXISTS (SELECT FROM config.secret WHERE key_id IS NOT NULL)")
}

// dataKey gives the data key in force, or makes the first one. What is stored in the clear is sealed with it.
func (t *Tx) dataKey(ctx context.Context) (secret.DataKey, error) {
	k := t.db.ownKeyring()
	if err := t.entitle(ctx, k); err != nil {
		return secret.DataKey{}, err
	}
	wraps, err := readWraps(ctx, t.tx)
	if err != nil {
		return secret.DataKey{}, err
	}
	if len(wraps) == 0 {
		return t.renewDataKey(ctx, secret.DataKey{}, k)
	}
	key, err := unwrap(wraps, k)
	if err != nil {
		return key, err
	}
	return key, t.reseal(ctx, key, key)
}

// entitle makes those who can open the data key the members, and in no cluster this node alone. Who comes gets a wrap of it. Where one
// goes, a new data key takes its place, and all secrets are sealed anew: what is set from now on opens with nothing that they know.
func (t *Tx) entitle(ctx context.Context, k keyring) error {
	wraps, err := readWraps(ctx, t.tx)
	if err != nil || len(wraps) == 0 {
		return err
	}
	entitled, err := t.entitled(ctx, k)
	if err != nil {
		return err
	}
	var lacking []string
	for _, public := range entitled {
		if !slices.ContainsFunc(wraps, func(w secret.Wrap) bool { return w.PublicKey == public }) {
			lacking = append(lacking, public)
		}
	}
	gone := slices.ContainsFunc(wraps, func(w secret.Wrap) bool { return !slices.Contains(entitled, w.PublicKey) })
	if !gone && len(lacking) == 0 {
		return nil
	}
	key, err := unwrap(wraps, k)
	if err != nil {
		return err
	}
	if gone {
		_, err = t.renewDataKey(ctx, key, k)
		return err
	}
	return t.wrapFor(ctx, key, lacking)
}

// renewDataKey puts a new data key in the place of old, seals all that old opens with it, and wraps it for those entitled.
func (t *Tx) renewDataKey(ctx context.Context, old secret.DataKey, k keyring) (secret.DataKey, error) {
	key := secret.NewDataKey()
	self, err := k.self()
	if err != nil {
		return key, err
	}
	entitled, err := t.entitled(ctx, k)
	if err != nil {
		return key, err
	}
	if !slices.Contains(entitled, secret.PublicText(self)) {
		return key, fmt.Errorf("%w: this node's key is not the one that the cluster knows", ErrNoDataKey)
	}
	if err := t.exec(ctx, "DELETE FROM config.secret_key"); err != nil {
		return key, err
	}
	if err := t.wrapFor(ctx, key, entitled); err != nil {
		return key, err
	}
	return key, t.reseal(ctx, old, key)
}

// entitled gives the public keys of those who may open the data key.
func (t *Tx) entitled(ctx context.Context, k keyring) ([]string, error) {
	var all []string
	err := collect(ctx, t.tx, &all, func(r pgx.Rows, s *string) error { return r.Scan(s) }, "SELECT DISTINCT public_key FROM config.node")
	if err != nil || len(all) > 0 {
		return all, mapError(err)
	}
	self, err := k.self()
	if err != nil {
		return nil, err
	}
	return []string{secret.PublicText(self)}, nil
}

// wrapFor wraps the data key for nodes. One whose key is none gets nothing: nobody trusts it either, and status names it.
func (t *Tx) wrapFor(ctx context.Context, key secret.DataKey, publicKeys []string) error {
	for _, public := range publicKeys {
		w, err := key.WrapFor(public)
		if err != nil {
			t.db.log.Warn().Err(err).Msg("secret.not_wrapped")
			continue
		}
		err = t.exec(ctx, "INSERT INTO config.secret_key (key_id, public_key, wrapped) VALUES ($1, $2, $3)", w.KeyID, w.PublicKey, w.Wrapped)
		if err != nil {
			return err
		}
	}
	return nil
}

// reseal seals with to what from opens, and what is in the clear. What does not open stays as it is, lost already: it must not keep a
// node in that is to go.
func (t *Tx) reseal(ctx context.Context, from, to secret.DataKey) error {
	var rows []sealed
	if err := collect(ctx, t.tx, &rows, scanSealed, selectSealed+" WHERE key_id IS DISTINCT FROM $1", to.ID()); err != nil {
		return mapError(err)
	}
	var names []string
	var values [][]byte
	for _, r := range rows {
		value, err := r.open(from, nil)
		if err != nil {
			t.db.log.Error().Str("name", r.name).Err(err).Msg("secret.lost")
			continue
		}
		names, values = append(names, r.name), append(values, to.Seal(r.name, value))
	}
	if len(names) == 0 {
		return nil
	}
	return t.exec(ctx, `UPDATE config.secret s SET value = n.value, key_id = $3 FROM unnest($1::text[], $2::bytea[]) n(name, value)
		WHERE s.name = n.name`, names, values, to.ID())
}

// A sealed is a row of config.secret.
type sealed struct {
	name  string
	value []byte
	keyID *string // nil: in the clear
}

const selectSealed = "SELECT name, value, key_id FROM config.secret"

func scanSealed(r pgx.Rows, s *sealed) error { return r.Scan(&s.name, &s.value, &s.keyID) }

// open gives the value; keyErr is why there is no data key.
func (s sealed) open(key secret.DataKey, keyErr error) ([]byte, error) {
	switch {
	case s.keyID == nil:
		return s.value, nil
	case keyErr != nil:
		return nil, keyErr
	}
	return key.Open(s.name, s.value)
}

func readWraps(ctx context.Context, q querier) ([]secret.Wrap, error) {
	var all []secret.Wrap
	err := collect(ctx, q, &all, func(r pgx.Rows, w *secret.Wrap) error { return r.Scan(&w.KeyID, &w.PublicKey, &w.Wrapped) },
		"SELECT key_id, public_key, wrapped FROM config.secret_key")
	return all, mapError(err)
}

// unwrap gives the data key; ErrNoDataKey.
func unwrap(wraps []secret.Wrap, k keyring) (secret.DataKey, error) {
	own, err := k.open()
	if err != nil {
		return secret.DataKey{}, err
	}
	key, err := secret.Unwrap(wraps, own)
	if err != nil {
		return key, fmt.Errorf("%w: %w", ErrNoDataKey, err)
	}
	return key, nil
}

// Secret gives the value of a secret; ErrNoSuch, ErrNoDataKey, secret.ErrSealed.
func (d *DB) Secret(ctx context.Context, name string) ([]byte, error) {
	rows, key, keyErr, err := d.readSealed(ctx, selectSealed+" WHERE name = $1", name)
	if err == nil && len(rows) == 0 {
		err = ErrNoSuch
	}
	if err == nil {
		var value []byte
		if value, err = rows[0].open(key, keyErr); err == nil {
			return value, nil
		}
	}
	return nil, fmt.Errorf("secret %s: %w", name, err)
}

// OpenSecrets opens the secrets of those names that are there and that this node can open, and gives them as they are stored, too, for a
// file. One that is in the clear is in no box.
func (d *DB) OpenSecrets(ctx context.Context, names []string) (map[string][]byte, *secret.Box, error) {
	values, box := make(map[string][]byte), new(secret.Box)
	if len(names) == 0 {
		return values, box, nil
	}
	var wraps []secret.Wrap
	rows, key, keyErr, err := d.readSealed(ctx, selectSealed+` WHERE name = ANY ($1) ORDER BY name COLLATE "C"`, names)
	if err == nil {
		wraps, err = readWraps(ctx, d.pool)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read secrets: %w", mapError(err))
	}
	for _, r := range rows {
		value, err := r.open(key, keyErr)
		if err != nil {
			continue // Secrets tells why
		}
		values[r.name] = value
		if r.keyID != nil {
			box.Sealed = append(box.Sealed, secret.Sealed{Name: r.name, KeyID: *r.keyID, Value: r.value})
		}
	}
	if own, err := d.ownKey(); err == nil {
		public := secret.PublicText(own.Public().(ed25519.PublicKey))
		for _, w := range wraps {
			if w.PublicKey == public && len(box.Sealed) > 0 && w.KeyID == box.Sealed[0].KeyID {
				box.Wraps = append(box.Wraps, w)
			}
		}
	}
	return values, box, nil
}

// A SecretRow says how a secret is kept, without its value.
type SecretRow struct {
	Name string
	// Clear says that it was stored by an earlier version, and not yet sealed.
	Clear bool
	// Err is why this node cannot open it; nil where it can.
	Err error
}

// Secrets tries to open all secrets, by name.
func (d *DB) Secrets(ctx context.Context) ([]SecretRow, error) {
	rows, key, keyErr, err := d.readSealed(ctx, selectSealed+` ORDER BY name COLLATE "C"`)
	if err != nil {
		return nil, fmt.Errorf("read secrets: %w", err)
	}
	all := make([]SecretRow, len(rows))
	for i, r := range rows {
		_, err := r.open(key, keyErr)
		all[i] = SecretRow{r.name, r.keyID == nil, err}
	}
	return all, nil
}

// readSealed reads rows and the data key as of one moment. keyErr is why there is none; the key file is read only for what is sealed.
func (d *DB) readSealed(ctx context.Context, sql string, args ...any) (rows []sealed, key secret.DataKey, keyErr, err error) {
	var wraps []secret.Wrap
	err = d.read(ctx, func(tx pgx.Tx) error {
		if err := collect(ctx, tx, &rows, scanSealed, sql, args...); err != nil {
			return err
		}
		wraps, err = readWraps(ctx, tx)
		return err
	})
	if err == nil && slices.ContainsFunc(rows, func(r sealed) bool { return r.keyID != nil }) {
		key, keyErr = unwrap(wraps, d.ownKeyring())
	}
	return rows, key, keyErr, err
}

// SecretNames lists the names of all secrets.
func (d *DB) SecretNames(ctx context.Context) ([]string, error) {
	var names []string
	err := collect(ctx, d.pool, &names, func(r pgx.Rows, s *string) error { return r.Scan(s) },
		`SELECT name FROM config.secret ORDER BY name COLLATE "C"`)
	if err != nil {
		return nil, fmt.Errorf("read secrets: %w", mapError(err))
	}
	return names, nil
}

// leaveWith is entitle of a node that leaves its cluster for good, and from now on has another key. Where it cannot open its secrets it
// leaves all the same: they stay as they are.
func (t *Tx) leaveWith(ctx context.Context, next ed25519.PublicKey) error {
	err := t.entitle(ctx, keyring{t.db.ownKey, func() (ed25519.PublicKey, error) { return next, nil }})
	if errors.Is(err, ErrNoDataKey) {
		t.db.log.Warn().Err(err).Msg("secret.lost")
		return nil
	}
	return err
}
