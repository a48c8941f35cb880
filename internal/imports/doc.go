// Package imports holds the table of which package may import which, and the test that keeps the code to it.
package imports
